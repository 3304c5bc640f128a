"""A function in another file than the model that calls it."""


def branch_on_data(x):
    if x.sum() > 0:
        return x
    return -x
