"""Synthetic data: procedural problems, worksheets, recall documents and chats.

Every generator is a function of (configuration, seed, index), so any number of workers writes the
same bytes. `phiforge.synth.synthesize.run` is the stage.
"""
