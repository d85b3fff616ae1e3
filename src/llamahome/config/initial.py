"""What the values of lora.init have in common, by which config/, model/, training/ and planning/ tell them apart."""

SUBTRACTED = ("pissa", "pissa_niter_4", "olora")
"""Values with which the product of A and B is not zero at the start, and is subtracted."""
FROM_WEIGHTS = (*SUBTRACTED, "loftq")
"""Values whose initial factors are computed from the weights of the base, and whose product is not zero."""
