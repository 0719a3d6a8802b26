"""How far down the ontology a call can be trusted.

A cell whose scores are split among CD4 and CD8 T cells is a T cell for sure. A candidate's share of the score
counts for every ancestor of its term; the answer is the deepest term that gathers enough of it. Free text has
no ancestors and its share stays with itself, so that it can only make a term less sure.

Shape suffixes: N cells, C candidates, A terms (candidates' own and their ancestors).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from langcell.text.ontology import Ontology


def roll_up(share_NC: np.ndarray, terms: Sequence[str], ontology: Ontology, enough: float) -> np.ndarray:
    """CL id of the deepest term whose candidates have at least `enough` of the score (object [N]); '' for
    none.

    share_NC: scores of which each row sums to 1; terms: CL id of each candidate, '' for free text. Of equally
    deep terms the one with the larger share is the answer, then the one whose id comes first.
    """
    above = [{term, *ontology.ancestors(term)} if term else set() for term in terms]
    every = sorted({term for ids in above for term in ids if term.startswith("CL:")})
    if not every:
        return np.full(len(share_NC), "", object)
    under_CA = np.array([[term in ids for term in every] for ids in above], np.float64)
    share_NA = share_NC.astype(np.float64) @ under_CA
    depth_A = np.array([ontology.depth(term) for term in every])
    # Depth decides, the share among equally deep ones; rounding must not cost a term all of its candidates.
    rank_NA = np.where(share_NA >= enough - 1e-6, depth_A + np.minimum(share_NA, 1) / 2, -1.0)
    best = rank_NA.argmax(1)
    found = rank_NA[np.arange(len(best)), best] >= 0
    return np.where(found, np.array(every, object)[best], "")
