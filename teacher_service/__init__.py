"""The cloud side: hosts a classifier behind gRPC and sells its answers from prepaid budgets."""
