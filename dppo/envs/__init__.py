"""Environments as training sees them: observation histories, action chunks, one view of every autoreset mode."""
