"""What tests share: guests, rings and front ends of their own, and the dmaproof command."""
