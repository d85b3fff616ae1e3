"""`make bench` compares llamahome with its peers on the same work. The other scripts in this folder measure single parts."""
