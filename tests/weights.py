"""What tests do to the weights of a pipeline."""


def realigned(pipe):
    """Copy all weights to memory of their own, so that pictures of equal weights are equal to the bit.

    Weights stay where their file is mapped, at addresses of any alignment, and on some processors a product of a matrix
    and a vector is summed in an order that depends on it (about 1e-7 of difference, on an AMD EPYC).
    """
    for network in pipe.networks.values():
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
    return pipe
