"""raysweep: which learning rate and batch size for a model of N parameters on D tokens?"""
