"""What people look at: one offline HTML page, figures for a README, Markdown for a pull request."""
