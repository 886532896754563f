"""Generated stubs of KEDA's external scaler: `make proto`."""
