"""The paper's model, and its training and search."""
