"""What the manifests of our folders say: one schema each, and what their readers check."""
