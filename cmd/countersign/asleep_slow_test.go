//go:build slow

package main

import "time"

const asleep = 90 * time.Second
