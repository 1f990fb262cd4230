"""The reference training for PRIME, built around prime_kernels."""
