"""IFR in other people's models: towers found and replaced, torchvision's and mmdet's detectors refined.

Nothing is imported here, so that one framework's absence is never another's trouble.
"""
