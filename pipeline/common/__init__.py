"""What every wing uses: settings, errors, files, random numbers, strict YAML."""
