LAST = 7.0


def tail(x):
    return x - LAST
