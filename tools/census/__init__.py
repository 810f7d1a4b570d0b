"""Models in, figures and pages out: what the package does with many models at once.

The census of what converts, of what is identified, and the hashes by which two versions are compared. Nothing here is
imported by the package.
"""
