"""What people typed to rows: any row of any kind of file by its number, without reading the whole. Begin with sources."""
