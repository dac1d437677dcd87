"""Several instances behind one address: configurations, and what swaps their model."""
