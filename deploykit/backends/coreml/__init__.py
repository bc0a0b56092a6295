"""Core ML: .mlpackage folders, for apps on iPhones, iPads and Macs."""
