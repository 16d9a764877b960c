"""What videos show, measured from their pixels: nothing here is trained."""
