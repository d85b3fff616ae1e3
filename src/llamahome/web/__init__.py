"""What every server of llamahome shares: who may ask, the socket, and the end on a signal."""
