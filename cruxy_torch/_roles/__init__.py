"""What each parameter of a model is: labels, groups, masks, tables, and where q, k and v lie."""
