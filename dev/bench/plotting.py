"""matplotlib for the programs of this folder, where it is installed: tables need none."""


def pyplot(without):
    """matplotlib.pyplot drawing to files; None, after printing `without`, when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print(without)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt
