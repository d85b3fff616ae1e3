"""The examples of all rows, tokenized once into files or while the model trains. Start reading at row_reader.py."""
