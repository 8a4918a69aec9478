"""Files from strangers: mutations of valid tiny files of each format, and the law that reading one is right or one clear error.

`formats` holds the valid files, how each is read, and an independent reading of the same bytes; `mutations` what is done to
them; `law` the judgement. `python -m tests.files` prints the figures.
"""
