//go:build !slow

package main

import "time"

// asleep is how long a stopped broker sleeps on after its intent was given up.
const asleep = time.Second
