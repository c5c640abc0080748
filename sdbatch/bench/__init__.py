"""How fast the machine at hand makes pictures, and what makes it so: torch alone, no Ray, no job, no store."""
