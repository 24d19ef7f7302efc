"""What a grid holds: a layer, its feature maps, and their units projected from what each sees."""
