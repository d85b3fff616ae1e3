"""From paths to rows: any row of any kind of file by its number, without reading the whole file. Begin with sources."""
