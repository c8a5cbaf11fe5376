"""What is learnt: one package a kind of data, behind one protocol."""
