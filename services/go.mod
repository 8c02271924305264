module github.com/stopline-traffic/stopline/services

go 1.26.0

replace (
	github.com/stopline-traffic/stopline/api => ../api
	github.com/stopline-traffic/stopline/pkg => ../pkg
)

require (
	github.com/stopline-traffic/stopline/api v0.0.0
	github.com/stopline-traffic/stopline/pkg v0.0.0
	google.golang.org/protobuf v1.36.12 // indirect
)
