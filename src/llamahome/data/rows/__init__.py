"""Rows to conversations: the format of the rows, and what is wrong with a row. Begin with formats."""
