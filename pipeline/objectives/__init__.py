"""One objective a file: a frozen `Config` that is called as `config(model, batch)`.

It returns (loss_sum, metrics): the loss summed over the batch's valid rows, a scalar with gradient, and metrics
summed over the valid rows, as detached tensors on the device.
"""
