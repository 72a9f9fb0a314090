"""The optimum of a cell and its law: one hierarchical model of all trials, and the literature."""
