"""Does an optimizer still do the right thing inside the training loop that people write around it?

``python -m grass_compile.conformance [OPTIMIZER…]`` runs some thirty short loops (accumulate, clip, freeze, skip, resume, ...) on
optimizers of torch, of other packages and of this one, and compares the weights with what the same optimizer makes of the plain
loop that is equal to it by mathematics: handed the clipped gradient, the summed gradient, or the run that was never interrupted.

A loop is a function in ``sequences``, an optimizer one in ``subjects``; adding either is adding that function. Nothing here needs
more than torch.
"""
