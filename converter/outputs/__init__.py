"""Write a folder and verify it: a checkpoint or an adapter."""
