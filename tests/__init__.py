"""What holds fastattn to its word: a folder for each part of the house, and what several of them need in support."""
