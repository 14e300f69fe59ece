"""What of the line holds on one CUDA card, in six minutes: ``python -m benchmarks.gpu``. Without Ray or network."""
