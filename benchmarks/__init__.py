"""`make bench`: llamahome beside its peers on the same work. The scripts beside this file measure single parts and run alone."""
