"""What a compiled program will need and do, read from the program itself: memory, arithmetic, collectives."""
