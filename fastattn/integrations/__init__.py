"""fastattn inside other people's models, one module per library."""
