"""What a person (or a program) sees of a conversion: alike rows collapsed, the console, the JSON document."""
