"""Rows to conversations: which format, and what is wrong with a row. Begin with formats."""
