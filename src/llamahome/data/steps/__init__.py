"""Examples to steps: the order of rows, who has which, and the next steps laid out ahead. Begin with order."""
