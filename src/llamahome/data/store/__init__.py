"""Examples of all rows, tokenized once into files or while the model trains. Begin with reading."""
