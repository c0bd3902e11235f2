"""What a plan computes: in float, in fake-quant, with the values of the integer program."""
