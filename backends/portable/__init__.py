"""Bodies that more than one backend registers, kernels or plain torch; no constant of a device in
here: what a device is good at comes as `Limits`."""
