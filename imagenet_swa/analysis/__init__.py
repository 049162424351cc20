"""What finished runs show: averages of their captures, ensembles, the loss around the weights, how sure a gain is."""
