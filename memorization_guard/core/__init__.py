"""What is measured, what it is held against, and what follows. Needs torch, numpy and safetensors, and knows no host."""
